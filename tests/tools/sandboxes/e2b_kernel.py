"""The process that runs a sandbox's code for `e2b_server`: one namespace, messages like those of a Jupyter kernel.

Reads calls as lines of JSON, writes messages as lines of JSON. An interrupt (SIGINT) is a `KeyboardInterrupt` in
the code, as with Jupyter. Where Landlock is there, it holds the code to its own folder and away from TCP, so that
the server's machine is to the code what the host is to E2B's virtual machine.
"""

import ast
import base64
import io
import json
import os
import signal
import sys
import threading
import time
import traceback

FLUSH_SECONDS = 0.02


def contain(inside: str, folder: str, internet: bool) -> None:
    """Hold this process to its folder."""
    sys.path.insert(0, inside)
    from inside.linux import READ, Ruleset, forbid_new_privileges, supported_abi, take

    sys.path.remove(inside)
    if not supported_abi() or internet:
        return
    abi = supported_abi()
    readable = {sys.prefix, sys.base_prefix, os.path.realpath(sys.executable), "/usr", "/lib", "/lib64", "/etc", "/dev"}
    paths = sorted(path for path in readable if os.path.exists(path))
    rules = Ruleset(abi, [(os.open(path, os.O_PATH), READ) for path in paths])
    rules.begin(folder)
    take([forbid_new_privileges(), rules.restrict])


class Kernel:
    def __init__(self, out: int) -> None:
        self.out = out
        self.lock = threading.RLock()
        self.calls = 0
        self.names = {"__name__": "__main__", "display": self.display}
        self.streams = {name: Stream(self.lock) for name in ("stdout", "stderr")}
        sys.stdout, sys.stderr = self.streams["stdout"], self.streams["stderr"]
        threading.Thread(target=self.flush_for_ever, daemon=True).start()

    def send(self, **message: object) -> None:
        line = (json.dumps(message) + "\n").encode()
        with self.lock:
            while line:
                line = line[os.write(self.out, line) :]

    def flush(self) -> None:
        # Taken and sent in one, or what another thread has taken would come after the end of the call.
        with self.lock:
            for name, stream in self.streams.items():
                text = stream.take()
                if text:
                    self.send(type=name, text=text, timestamp=time.strftime("%FT%TZ", time.gmtime()))

    def flush_for_ever(self) -> None:
        while True:
            time.sleep(FLUSH_SECONDS)
            self.flush()

    def display(self, value: object, *, is_main_result: bool = False) -> None:
        self.flush()
        text = repr(value)
        # As E2B's server does.
        text = text[1:-1] if text.startswith("'") and text.endswith("'") else text
        message = {"type": "result", "text": text, "is_main_result": is_main_result, "extra": {}}
        for kind in ("png", "jpeg"):
            as_image = getattr(value, f"_repr_{kind}_", None)
            content = as_image() if as_image else None
            if content:
                message[kind] = base64.b64encode(content).decode()
                break
        self.send(**message)

    def show_figures(self) -> None:
        pyplot = sys.modules.get("matplotlib.pyplot")
        for number in pyplot.get_fignums() if pyplot else ():
            figure, file = pyplot.figure(number), io.BytesIO()
            figure.savefig(file, format="png")
            encoded = base64.b64encode(file.getvalue()).decode()
            self.send(type="result", text=repr(figure), png=encoded, is_main_result=False, extra={})
        if pyplot:
            pyplot.close("all")

    def run(self, code: str) -> None:
        self.calls += 1
        self.send(type="number_of_executions", execution_count=self.calls)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.evaluate(code)
        except BaseException as error:
            self.flush()
            lines = traceback.format_exception(error.with_traceback(_without_us(error)))
            # IPython colours it.
            coloured = "\x1b[0;31m" + "".join(lines).rstrip() + "\x1b[0m"
            self.send(type="error", name=type(error).__name__, value=str(error), traceback=coloured)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.flush()
        self.send(type="end_of_execution")

    def evaluate(self, code: str) -> None:
        tree = ast.parse(code, "cell")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), self.names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), self.names)
            if value is not None:
                self.display(value, is_main_result=True)
        self.show_figures()


class Stream(io.TextIOBase):
    def __init__(self, lock: threading.RLock) -> None:
        self.lock = lock
        self.pieces: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self.lock:
            self.pieces.append(text)
        return len(text)

    def take(self) -> str:
        taken, self.pieces = self.pieces, []
        return "".join(taken)


def _without_us(error: BaseException):
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != "cell":
        trace = trace.tb_next
    return trace


def main() -> None:
    inside, folder, internet = sys.argv[1:4]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The code may write to 1; the messages have a descriptor of their own.
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    calls = sys.stdin
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.chdir(folder)
    os.environ |= {"MPLBACKEND": "agg", "MPLCONFIGDIR": folder, "HOME": folder}
    contain(inside, folder, internet == "True")
    kernel = Kernel(out)
    for line in calls:
        kernel.run(json.loads(line))


if __name__ == "__main__":
    main()
