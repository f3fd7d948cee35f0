"""``python -m pretrain`` is the same command as ``pretrain``."""

from pretrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
