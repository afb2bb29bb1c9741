"""``python -m mdkern``."""

from mdkern.cli.main import main

raise SystemExit(main())
