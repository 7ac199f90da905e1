"""`python -m hf_moe_cli`, which is how launchers of many processes start `hf-moe`."""

import sys

from . import main

sys.exit(main())
