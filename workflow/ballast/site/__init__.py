"""The leaderboard: one static page for a suite, and a page for each of its cells."""

from ballast.site.page import write_site

__all__ = ["write_site"]
