"""Read tables, encode histories, and build training rows."""
