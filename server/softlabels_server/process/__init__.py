"""Serving processes: one server process, the supervisor of several, and their memory."""
