import sys

from pairsync.cli import main

sys.exit(main())
