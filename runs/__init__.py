"""What keeps a run whole: folder, caches, signals, several processes, the command line."""

import os
import sys

if sys.version_info < (3, 10):
    sys.exit("flashaudio needs Python 3.10 or newer")
# Two OpenMP threads wait for each other busily: beside another program that costs a factor of ten.
# It has to be said before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
