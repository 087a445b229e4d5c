"""safeopt inside other libraries' training loops."""
