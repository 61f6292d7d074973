"""Sounds in: toy set, other people's data sets, and what training reads of them."""
