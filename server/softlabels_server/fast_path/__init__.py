"""The fast path: repeated batch requests and long streams are written straight to the socket."""
