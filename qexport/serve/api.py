"""The HTTP interface: routes, and how their answers look in OpenAPI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from qexport.bundle.manifest import installed_version
from qexport.errors import InputError
from qexport.runtime.inputs import label_input
from qexport.serve.engine import Engine
from qexport.serve.failures import DeadlineError, RequestError
from qexport.serve.guard import CLIENT_GONE, Guard, error_response
from qexport.serve.jobs import Drawn, Job
from qexport.serve.logs import event
from qexport.serve.metrics import CONTENT_TYPE, Metrics
from qexport.serve.pictures import MEDIA_TYPES, encode
from qexport.serve.schema import json_schema, parse, request_model
from qexport.serve.settings import ServeSettings

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob:; connect-src 'self'"
)
"""Content security policy of our pages: they load nothing from anywhere else."""

LATE_S = 0.5
"""How much later than the engine the interface gives up a request: whoever notices first answers the same."""

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
        }
    },
}
_ERRORS = {
    400: "not JSON",
    408: "the request came too slowly",
    413: "the request is too large",
    422: "a field is wrong; the message names it",
    429: "the queue is full; see Retry-After",
    500: "drawing failed",
    503: "the service is starting or stopping, or what drew the images ended; see Retry-After",
    504: "not ready in time",
}


def _error_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": _ERROR_SCHEMA}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def create_app(engines: Sequence[Engine], settings: ServeSettings, metrics: Metrics) -> FastAPI:
    """The application; its lifespan starts and stops the engines.

    Args:
        engines: one per bundle, not started; the first is the default.
        settings: limits, the same as the engines'.
        metrics: the same as the engines'.

    Raises:
        InputError: two bundles have the same name, or there is none.
    """
    by_name = {engine.name: engine for engine in engines}
    if len(by_name) != len(engines) or not engines:
        raise InputError("bundles must have different names; rename a folder")
    model = request_model({name: engine.bundle.plan for name, engine in by_name.items()}, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for engine in engines:
            engine.start()
        yield
        done = await asyncio.gather(*(asyncio.to_thread(engine.stop, settings.drain_s) for engine in engines))
        event("stopped", drained=all(done))

    app = FastAPI(
        title="qexport",
        version=installed_version(),
        summary="Images from quantised generators.",
        docs_url=None,  # FastAPI's own page loads its script from another site
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.draining = False
    app.state.engines = tuple(engines)
    app.add_middleware(Guard, settings=settings, metrics=metrics)

    @app.exception_handler(RequestError)
    async def failed(_: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        content = {"error": {"code": "http", "message": str(error.detail)}}
        return JSONResponse(content, error.status_code, error.headers)

    @app.post(
        "/v1/images",
        response_class=Response,
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": json_schema(model)}}}
        },
        responses={
            200: {
                "description": "The image, or all of them. Headers: X-Qexport-Bundle, -Digest, -Seed, -Buckets.",
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()},
            },
            **_error_docs(400, 408, 413, 422, 429, 500, 503, 504),
        },
    )
    async def images(request: Request) -> Response:
        """Draw images. The same request gives the same bytes wherever X-Qexport-Buckets is the same."""
        wanted = parse(model, await request.body())
        engine = by_name[wanted.bundle or engines[0].name]
        notes = request.state.notes
        notes |= {"bundle": engine.name, "n": len(wanted.classes), "seed": wanted.seed}
        job = engine.submit(
            wanted.classes,
            wanted.given_settings,
            seed=wanted.seed,
            first_index=wanted.first_index,
            schedule=wanted.schedule,
            timeout_s=wanted.timeout_s,
        )
        drawn = await _outcome(request, job, min(wanted.timeout_s or settings.deadline_s, settings.deadline_s))
        if drawn is None:
            return Response(status_code=CLIENT_GONE)  # for the log; nobody is there to read it
        buckets = ",".join(map(str, drawn.buckets))
        notes |= {"queued_ms": round(drawn.queued_s * 1000, 1), "buckets": buckets}
        body = await asyncio.to_thread(encode, drawn.pixels, wanted.classes, wanted.format)
        headers = {
            "x-qexport-bundle": engine.name,
            "x-qexport-digest": engine.bundle.manifest.digest,
            "x-qexport-seed": str(wanted.seed),
            "x-qexport-buckets": buckets,
        }
        return Response(body, media_type=MEDIA_TYPES[wanted.format], headers=headers)

    @app.get("/v1/bundles")
    async def bundles() -> list[dict[str, Any]]:
        """What is served: models, sizes, classes, settings with their defaults and limits."""
        return [_facts(engine) for engine in engines]

    @app.get("/healthz", responses={503: {"description": "a thread that draws has ended"}})
    async def health() -> JSONResponse:
        """200 while every thread that draws is alive; otherwise the process should be replaced."""
        dead = [engine.name for engine in engines if not engine.alive]
        return JSONResponse({"alive": not dead, "dead": dead}, 503 if dead else 200)

    @app.get("/readyz", responses={503: {"description": _ERRORS[503]}})
    async def ready() -> JSONResponse:
        """200 when requests are welcome: every bundle is warm and the service was not told to stop."""
        good = not app.state.draining and all(engine.ready for engine in engines)
        return JSONResponse({"ready": good}, 200 if good else 503)

    @app.get("/metrics", response_class=Response)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page("page.html")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return _page("docs.html")

    return app


async def _outcome(request: Request, job: Job, wait_s: float) -> Drawn | None:
    """The images, or None if the client left; then nobody draws what is still queued.

    Raises:
        RequestError: why there are none.
    """
    done = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({done, gone}, timeout=wait_s + LATE_S, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        if gone.done():
            return None
        raise DeadlineError("the images were not ready in time; ask for fewer, or again later")
    finally:
        gone.cancel()
        done.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _facts(engine: Engine) -> dict[str, Any]:
    bundle = engine.bundle
    manifest, plan = bundle.manifest, bundle.plan
    labels = label_input(plan)
    return {
        "name": engine.name,
        "digest": manifest.digest,
        "model": manifest.model.name,
        "source": manifest.model.source,
        "scheme": manifest.scheme,
        "bits_per_weight": manifest.totals.get("bits_per_weight_all"),
        "size_bytes": bundle.size_bytes,
        "provider": engine.provider,
        "image_size": manifest.model.image_size,
        "classes": manifest.model.num_classes,
        "buckets": list(engine.settings.buckets),
        "schedules": list(plan.schedules),
        "schedule": plan.schedule or None,
        "settings": [
            {name: getattr(spec, name) for name in ("name", "dtype", "default", "minimum", "maximum", "doc")}
            for spec in plan.inputs
            if spec is not labels
        ],
    }  # fmt: skip


def _page(name: str) -> HTMLResponse:
    text = files("qexport.serve").joinpath(name).read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY})
