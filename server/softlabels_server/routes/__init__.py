"""The routes, one file each: what HTTP asks, and who answers."""
