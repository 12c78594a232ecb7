"""cotyledon: its defaults, one service, as many workers as the environment says."""

from __future__ import annotations

import os

import cotyledon
from cotyledon.types import WorkerId

from bench.peers import worker


class Service(cotyledon.Service):
    def __init__(self, worker_id: WorkerId) -> None:
        super().__init__(worker_id)
        self.connection = worker.connect()

    def run(self) -> None:
        worker.report_ready(os.environ[worker.READY])

    def terminate(self) -> None:
        worker.finish()
        self.connection.close()


if __name__ == "__main__":
    services = cotyledon.ServiceManager()
    services.add(Service, workers=int(os.environ[worker.WORKERS]))
    services.run()
