"""`python -m ds_sft COMMAND`: the same as `ds-sft COMMAND`, for torchrun, deepspeed and srun."""

import sys

from ds_sft.cli import main

sys.exit(main())
