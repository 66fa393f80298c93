"""How a store reaches its data: files of this process, requests, and how both forms wait."""
