"""The parts of bench/methods. `peer.py` runs in PEFT's Python (scripts/python-env.sh), the rest in any."""
