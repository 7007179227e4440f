"""What runs in the sandbox before the program: standard library only, started as a folder by sandbox.py.

    flex --spec, token--> outer --unshare, fork--> supervisor (process 1) --fork--> a stage
    flex <--report------- supervisor <--what a stage prints, and its end channel-- a stage

The outer process makes the name spaces, the supervisor the file system; it starts the stages one
after another (say compile, run), keeps their limits and reports. When it ends, the kernel kills all
that is left. A stage has no capability, another user id where possible, and none of our pipes.
"""

import sys

from stages import main

if __name__ == "__main__":
    sys.exit(main())
