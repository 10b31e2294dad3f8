"""The fast path: repeated batch requests and long streams bypass the ASGI application."""
