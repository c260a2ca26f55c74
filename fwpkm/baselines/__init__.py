"""The same language model with no memory, other memories and other options, trained alike and compared."""
