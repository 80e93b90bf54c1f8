"""`python -m tests.gpu_rig [FORM ...]` builds these forms, all if none is named."""

import sys

from tests.gpu_rig.build import FORMS, BuildError, build

for name in sys.argv[1:] or FORMS:
    try:
        print(f"{name}: {build(name)}")
    except BuildError as error:
        sys.exit(f"{name}: {error}")
