"""The latest state snapshot of every user, with a bounded history, in memory or on disk.

A *state snapshot* holds some twenty axes such as warmth or cognitive_load, each from 0 to 1, with the
time it was taken, its source and a confidence. The same contract holds for every store, synchronous
(``MemoryStore``, ``QdrantStore``) and asynchronous (``AsyncMemoryStore``, ``AsyncQdrantStore``):

>>> store = open_store("memory://")
>>> store.upsert_latest(StateSnapshot("ada", {"warmth": 0.8, "urgency_sensitivity": 0.3}))
>>> store.get_latest("ada").axis("warmth")
0.8
>>> store.patch("ada", {"warmth": 0.6}).axis("urgency_sensitivity")
0.3
>>> [snapshot.axis("warmth") for snapshot in store.get_history("ada")]
[0.6, 0.8]
>>> store.search_similar({"warmth": 0.9}, limit=1)[0].snapshot.user_id
'ada'

``open_store("some/directory")`` gives the same store on disk, through Qdrant embedded in the process.

Every error is a ``StoreError``; its docstring shows the tree. Stores may be shared between threads, and
the asynchronous ones between tasks, under asyncio and trio. What a read returned never changes.
"""

__version__ = "0.1.0"

__all__ = [
    "ANY",
    "CANONICAL_AXES",
    "AsyncCollection",
    "AsyncDocumentSet",
    "AsyncMemoryStore",
    "AsyncQdrantStore",
    "AsyncStateStore",
    "AsyncUserDocuments",
    "Axes",
    "BackendError",
    "BackendRejectedError",
    "BackendTimeoutError",
    "BackendUnavailableError",
    "BadRow",
    "BreakerPolicy",
    "CircuitOpenError",
    "Collection",
    "CollectionInfo",
    "ConflictError",
    "Document",
    "DocumentMatch",
    "DocumentSet",
    "Embedder",
    "EmbeddingError",
    "ErasureReport",
    "HashingEmbedder",
    "Health",
    "History",
    "Match",
    "Matches",
    "MemoryOptions",
    "MemoryStore",
    "MemoryStoreConfig",
    "MissingDependencyError",
    "QdrantOptions",
    "QdrantStore",
    "QdrantStoreConfig",
    "RateLimitedError",
    "RetryPolicy",
    "SchemaMismatchError",
    "SnapshotError",
    "SnapshotFields",
    "SnapshotReport",
    "Source",
    "StateSnapshot",
    "StateStore",
    "StateTable",
    "StoreClosedError",
    "StoreError",
    "StoreLockedError",
    "TableReport",
    "UnsupportedServerError",
    "UpsertReport",
    "UserDocuments",
    "UserNotFoundError",
    "ValidationError",
    "acopy",
    "alist_snapshots",
    "arestore",
    "asnapshot_on_start",
    "averify_snapshot",
    "axis_name",
    "copy",
    "default_target",
    "list_snapshots",
    "open_async_store",
    "open_store",
    "read_table",
    "restore",
    "service_app",
    "snapshot_app",
    "snapshot_on_start",
    "store_exists",
    "verify_snapshot",
]
