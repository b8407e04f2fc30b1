# One context of the code interpreter: reads requests from one pipe, answers on another.
#
# Started by forkd-agent as `python3 -c <this> <request fd> <answer fd>`. Descriptors 1 and 2 are pipes
# to the agent, so what print(), os.write() and subprocesses write arrives alike.
#
# Frames, both ways: length (4 bytes little-endian, of what follows), kind (1 byte), fields (each with
# a length like it). No json, ast or signal module: an import costs tens of system calls, and each is
# slow where guest kernel mode is emulated. Idle, this process is blocked in one read and has no
# threads. wire.rs is the other side.
#
#   request  X persistent-env temporary-env name code    execute
#            W persistent-env temporary-env name code    execute, then freeze garbage
#            S persistent-env                            reseed
#   answer   B                                           ready (once)
#            R "1" or "0", then format, value, ...       a value; "1": of the last expression
#            E name value traceback                      raised
#            D                                           done with X or W; nothing runs until the next request
#            d                                           done, and threads go on, or a timer is set
#            S                                           reseeded


def _forkd_main():
    import sys
    import os
    import _ast
    import _signal
    import _thread
    import builtins
    import gc

    RESEED_SIGNAL = 39
    MAX_VALUE = 8 << 20
    KEPT_CELLS = 64

    # The names that this function relies on, out of reach of what user code does to the modules.
    read, write, exit_now = os.read, os.write, os._exit
    modules, environ = sys.modules, os.environ
    requests, answers = int(sys.argv[1]), int(sys.argv[2])
    for fd in (requests, answers):
        os.set_inheritable(fd, False)

    sys.argv = [""]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)

    main = type(sys)("__main__")
    main.__builtins__ = builtins
    modules["__main__"] = main
    space = main.__dict__

    cells = {}
    busy = False       # user code runs: SIGINT may raise
    writing = False    # an answer is half written: another one must wait
    forked = False     # this is a child that user code made by os.fork()
    ack_wanted = False
    counter = 0

    def send(frames):
        nonlocal writing, ack_wanted
        if forked:
            return
        writing = True
        view = memoryview(frames)
        while view:
            view = view[write(answers, view):]
        writing = False
        if ack_wanted:
            ack_wanted = False
            send(frame(b"S"))

    def field(text):
        data = text if type(text) is bytes else str(text).encode("utf-8", "backslashreplace")
        return len(data).to_bytes(4, "little") + data

    def frame(kind, *fields):
        body = b"".join([kind, *[field(f) for f in fields]])
        return len(body).to_bytes(4, "little") + body

    def on_fork():
        nonlocal forked
        forked = True

    os.register_at_fork(after_in_child=on_fork)

    def on_interrupt(signum, where):
        if busy:
            raise KeyboardInterrupt

    # asyncio and others ask whether the handler is the default one.
    _signal.default_int_handler = on_interrupt
    _signal.signal(_signal.SIGINT, on_interrupt)

    # The kernel is asked for one block of its generator: where it is emulated, each more costs a millisecond.
    try:
        from _sha3 import shake_256

        def entropy(count):
            return shake_256(os.urandom(32)).digest(count)
    except ImportError:
        entropy = os.urandom

    # Everything that draws random numbers from a state in this process, rather than from the kernel.
    def reseed():
        seed = entropy(160)
        module = modules.get("random")
        if module is not None:
            module.seed(seed[:64])
        module = modules.get("numpy.random")
        if module is not None:
            words = [int.from_bytes(seed[i:i + 4], "little") for i in range(64, 128, 4)]
            module.seed(words)
        module = modules.get("_ssl")
        if module is not None:
            module.RAND_add(seed[128:], 32.0)
        module = modules.get("tempfile")
        if module is not None:
            module._name_sequence = None

    def on_reseed(signum, where):
        nonlocal ack_wanted
        if forked:
            return
        reseed()
        if writing:
            ack_wanted = True
        else:
            send(frame(b"S"))

    _signal.signal(RESEED_SIGNAL, on_reseed)

    # The formats that an object offers, as IPython asks for them. Bytes become base64.
    def formats(value):
        out = ["text", repr(value)]
        kind = type(value)
        if kind.__module__ == "builtins":
            return out
        for name in ("html", "markdown", "svg", "png", "jpeg", "pdf", "latex", "json", "javascript"):
            method = getattr(kind, "_repr_%s_" % name, None)
            if method is None:
                continue
            try:
                data = method(value)
            except Exception:
                continue
            if data is None:
                continue
            if type(data) is tuple:
                data = data[0]
            if name == "json":
                import json
                data = json.dumps(data)
            elif isinstance(data, (bytes, bytearray)):
                import binascii
                data = binascii.b2a_base64(data, newline=False)
            out += [name, data]
        return out

    def value_frame(value, is_main):
        answer = frame(b"R", b"1" if is_main else b"0", *formats(value))
        if len(answer) > MAX_VALUE:
            raise ValueError("the value takes %d bytes to show; at most %d can be sent"
                             % (len(answer), MAX_VALUE))
        return answer

    def display(*values):
        for value in values:
            send(value_frame(value, False))

    space["display"] = display

    # The traceback module is slow to import, so it is imported when first needed, or when warming.
    def load_traceback():
        import linecache
        import traceback
        for name, code in cells.items():
            linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        return traceback

    # Leaves out this file's frames: those above the cell, and the handler that raised an interrupt.
    def own_frames_out(trace):
        ours = own_frames_out.__globals__
        while trace is not None and trace.tb_frame.f_globals is ours:
            trace = trace.tb_next
        last = trace
        while last is not None and last.tb_next is not None:
            if last.tb_next.tb_frame.f_globals is ours:
                last.tb_next = None
            last = last.tb_next
        return trace

    def error_frame(error, trace):
        try:
            value = str(error)
        except Exception:
            value = "<no text>"
        try:
            traceback = load_traceback()
            text = "".join(traceback.format_exception(type(error), error, trace))
        except Exception as problem:
            text = "%s: %s\n(no traceback: %r)\n" % (type(error).__name__, value, problem)
        limit = MAX_VALUE // 8
        if len(value) > limit:
            value = value[:limit] + "..."
        if len(text) > limit:
            text = text[:limit // 2] + "\n...\n" + text[-limit // 2:]
        return frame(b"E", type(error).__name__, value, text)

    # The last expression is turned into an assignment, so that one code object does everything.
    RESULT = "__forkd_result__"
    ONLY_AST, TOP_LEVEL_AWAIT, COROUTINE = 0x400, 0x2000, 0x80

    def compile_cell(code, name):
        tree = compile(code, name, "exec", ONLY_AST | TOP_LEVEL_AWAIT, True)
        if tree.body and type(tree.body[-1]) is _ast.Expr:
            last = tree.body[-1]
            place = {"lineno": last.lineno, "col_offset": last.col_offset,
                     "end_lineno": last.end_lineno, "end_col_offset": last.end_col_offset}
            target = _ast.Name(id=RESULT, ctx=_ast.Store(), **place)
            tree.body[-1] = _ast.Assign(targets=[target], value=last.value, **place)
        return compile(tree, name, "exec", TOP_LEVEL_AWAIT, True)

    def run_cell(code, name):
        nonlocal busy
        compiled = compile_cell(code, name)
        busy = True
        if compiled.co_flags & COROUTINE:
            import asyncio
            asyncio.run(eval(compiled, space))
        else:
            exec(compiled, space)
        busy = False

    def execute(name, code):
        nonlocal busy, counter
        counter += 1
        name = name or "<cell %d>" % counter
        cells[name] = code
        if len(cells) > KEPT_CELLS:
            del cells[next(iter(cells))]
        if "linecache" in modules:
            modules["linecache"].cache[name] = (len(code), None, code.splitlines(True), name)
        space.pop(RESULT, None)
        answer = b""
        try:
            run_cell(code, name)
            value = space.pop(RESULT, None)
            if value is not None:
                space["_"] = value
                busy = True
                answer = value_frame(value, True)
                busy = False
        except BaseException as error:
            busy = False
            trace = own_frames_out(error.__traceback__)
            answer = error_frame(error, trace)
            error = trace = None
        if forked:
            flush()
            exit_now(0)
        return answer

    def flush():
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass

    def set_env(pairs):
        saved = []
        for name, value in pairs:
            saved.append((name, environ.get(name)))
            environ[name] = value
        return saved

    def restore_env(saved):
        for name, value in reversed(saved):
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value

    # Also goes once the way that an execution goes, so that forked children find its pages mapped.
    def freeze():
        load_traceback()
        compile_cell("1", "<warm>")
        repr(1)
        gc.collect()
        gc.freeze()

    # Fields of a request. Environments are one field: NAME=value, separated by zero bytes.
    def fields(body):
        at, out = 1, []
        while at < len(body):
            end = at + 4 + int.from_bytes(body[at:at + 4], "little")
            out.append(body[at + 4:end].decode("utf-8", "surrogateescape"))
            at = end
        return out

    def pairs(text):
        return [tuple(item.split("=", 1)) for item in text.split("\0") if item]

    thread_count, timer_of = _thread._count, _signal.getitimer
    timers = (_signal.ITIMER_REAL, _signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF)

    # Whether user code may run between requests: then it must not wait for the next one to reseed.
    def awake():
        return thread_count() > 0 or any(timer_of(timer)[0] for timer in timers)

    def handle(body):
        nonlocal busy
        kind, parts = body[:1], fields(body)
        set_env(pairs(parts[0]))
        if kind == b"S":
            reseed()
            send(frame(b"S"))
            return
        saved = set_env(pairs(parts[1]))
        answer = execute(parts[2], parts[3])
        restore_env(saved)
        if kind == b"W" and not answer.startswith(b"E", 4):
            freeze()
        flush()
        send(answer + frame(b"d" if awake() else b"D"))

    send(frame(b"B"))
    pending = b""
    while True:
        data = read(requests, 65536)
        if not data:
            break
        pending = pending + data if pending else data
        while len(pending) >= 4:
            end = 4 + int.from_bytes(pending[:4], "little")
            if len(pending) < end:
                break
            body, pending = pending[4:end], pending[end:]
            handle(body)


_forkd_main()
