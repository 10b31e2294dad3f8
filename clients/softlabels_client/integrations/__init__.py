"""Integrations with training frameworks, one file each; each imports its framework."""
