"""``python -m flowalign`` and ``accelerate launch -m flowalign``."""

from flowalign.cli import main

main()
