"""The source of attuned_store, in modules."""
