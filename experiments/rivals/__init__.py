"""The rivals that the paper's abstract names, each a fork in one file; and a table of them all."""
