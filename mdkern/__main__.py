"""``python -m mdkern``."""

from mdkern.cli import main

raise SystemExit(main())
