"""The parts of bench/vs_hf_peft. `peer.py` and `models.py` run in the peer's Python (scripts/python-env.sh), the rest in any."""
