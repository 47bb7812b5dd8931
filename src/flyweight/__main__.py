"""`python -m flyweight`."""

from flyweight.face.cli import main

if __name__ == "__main__":
    main()
