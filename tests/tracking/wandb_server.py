"""A stand-in for the W&B server on a port of its own: enough of its API for a run, with faults on demand.

Rows arrive over ``/file_stream`` as JSON lines in ``wandb-history.jsonl``; everything else is answered just so that the client goes on.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """Attributes: ``rows`` (history as received, of all runs), ``summary``, ``config``, ``runs`` (names) and their ``ids``, which may be
    taken out, ``fault``: None, "refuse", "hang" or "slow".
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault = None
        self.rows, self.runs, self.ids, self.operations, self.uploads = {}, [], [], [], []
        self.summary = {}
        self.config, self.tags, self.group, self.job_type, self.exit_code = {}, [], "", "", None
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def history(self):
        return [self.rows[index] for index in sorted(self.rows)]

    def stop(self):
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer({})

    def do_PUT(self):
        self.server.uploads.append((self.path, self._body()))
        self._answer({})

    def do_POST(self):
        body = self._body()
        server = self.server
        if server.fault == "hang":
            server.released.wait(120)
            return
        if server.fault == "slow":
            time.sleep(0.5)
        if server.fault == "refuse":
            self._answer({"error": "permission denied"}, 403)
        elif "/file_stream" in self.path:
            sent = json.loads(body)
            for name, chunk in (sent.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    for place, line in enumerate(chunk["content"]):
                        server.rows[chunk["offset"] + place] = json.loads(line)
                elif name == "wandb-summary.json":
                    server.summary = json.loads(chunk["content"][-1])
            if sent.get("complete"):
                server.exit_code = sent.get("exitcode")
            self._answer({"exitcode": None, "limits": {}})
        else:
            self._graphql(json.loads(body))

    def _graphql(self, asked):
        server, query, variables = self.server, asked.get("query", ""), asked.get("variables") or {}
        server.operations.append(asked.get("operationName") or query[:60])
        project = {"id": "P", "name": "ckd_fed", "entity": {"id": "E", "name": "me"}}
        if "upsertBucket" in query:
            server.runs.append(variables.get("displayName"))
            server.ids.append(variables.get("name"))
            server.tags = variables.get("tags") or server.tags
            server.group = variables.get("groupName") or server.group
            server.job_type = variables.get("jobType") or server.job_type
            if variables.get("config"):
                server.config.update(json.loads(variables["config"]))
            bucket = {"id": "B", "name": variables.get("name"), "displayName": variables.get("displayName"), "config": "{}", "project": project}
            self._answer({"data": {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0, "sweepName": None}, "inserted": True}}})
        elif "RunResumeStatus" in query:
            rows = server.history()
            known = {
                "name": variables.get("name"), "displayName": "job", "logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]",
                "summaryMetrics": json.dumps(server.summary), "config": json.dumps(server.config),
                "tags": server.tags, "wandbConfig": "{\"t\": 1}",
            }  # fmt: skip
            bucket = known if variables.get("name") in server.ids else None
            self._answer({"data": {"model": {**project, "bucket": bucket}}})
        elif "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{server.url}/upload/{name}"} for name in variables.get("files", [])]
            self._answer({"data": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}})
        elif "viewer" in query:
            self._answer({"data": {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}})
        elif "serverInfo" in query or "ServerInfo" in query:
            self._answer({"data": {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}})
        else:
            self._answer({"data": None, "errors": [{"message": "not known here"}]})

    def _body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            data = gzip.decompress(data)
        return data

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
