"""What keeps a run whole: folder, caches, signals, several processes, the command line."""

import sys

if sys.version_info < (3, 10):
    sys.exit("flashaudio needs Python 3.10 or newer")
