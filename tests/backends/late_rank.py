"""`cpikan_hr.train` whose second rank writes into each checkpoint's folder long after the first has done so."""

import os
import sys
import time

from cpikan_hr.train import main
from cpikan_hr.training import checkpoints

save = checkpoints.save_state


def late(updater, folder):
    save(updater, folder)
    if os.environ["RANK"] == "1":
        time.sleep(2)
        (folder / "late").write_text("whole")


checkpoints.save_state = late
if __name__ == "__main__":
    sys.exit(main())
