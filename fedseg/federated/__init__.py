"""The round as plain functions on frozen values; nothing in here knows how messages travel."""
