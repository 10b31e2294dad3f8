"""HTTP: connections, retries, and rows of served stores."""
