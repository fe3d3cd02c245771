"""The study of what learning gains from earlier tasks; bench/learning.md declares it."""
