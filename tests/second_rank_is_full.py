"""`cpikan-hr` whose second process of a launch cannot write a file beyond 5000 bytes."""

import os
import resource
import sys

from cpikan_hr.cli import main

if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
sys.exit(main())
