"""`python -m rewardmodel`: the command line."""

import sys

from rewardmodel.cli import main

sys.exit(main())
