"""What keeps a run whole: its folder, its caches, several processes."""
