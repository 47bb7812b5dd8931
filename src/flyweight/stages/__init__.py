"""The stages of `compress`, each seeing the floors it needs: price, choose, deliver, weigh."""
