"""`python -m cpikan_hr` is `cpikan-hr`."""

import sys

from cpikan_hr.cli import main

sys.exit(main())
