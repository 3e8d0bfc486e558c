"""`python -m sfumato`, and `accelerate launch -m sfumato generate ...`."""

from sfumato.apps.cli import main

if __name__ == "__main__":
    main()
