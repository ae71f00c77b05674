"""python -m latent_verse.demo --world small --out demo"""

import sys

from latent_verse.demo.run import main

sys.exit(main())
