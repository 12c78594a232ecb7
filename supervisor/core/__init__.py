"""The decisions: events in, actions out, `now` passed in. No I/O, no clock, no log."""
