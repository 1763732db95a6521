"""``python -m lightning_resume``."""

import sys

from lightning_resume.cli import main

sys.exit(main())
