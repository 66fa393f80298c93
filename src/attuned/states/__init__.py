"""States of users: what a database does for them, and the operations of stores."""
