"""Train several configurations one after the other in the same processes: python -m tests.train.several CONFIG ..."""

import sys

from flowalign.run import train

for path in sys.argv[1:]:
    train(path)
