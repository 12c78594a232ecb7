"""The programs that ours is measured beside, each with the worker of `bench.peers.worker`."""
