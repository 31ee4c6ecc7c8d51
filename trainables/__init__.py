"""What runs on an accelerator: data, trials, evaluation, merge. Imports only ``cluster`` of ours."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for kernels on a hub, and says it found none
