"""The HTTP server: models, with their buckets, for every client that speaks OpenAI's or Anthropic's protocol.

A request goes this way: `guard` (host, origin) -> `routing` (key, body, errors) -> `models` (whose model it is, loaded
and held) -> a module of endpoints, such as `chat` -> `service` (reads and tokenizes in a thread) -> `worker` (the one
thread of a model that lets compute) -> pieces -> JSON, or `events` (a stream).

A module of endpoints has a function `routes()`, made of `routing.post` and `routing.get`, or `routing.about` for what
is about no certain model; `app.PARTS` lists the modules. What an endpoint needs:

- `chat.read_chat(service, body)` makes of an OpenAI chat request what is asked; call it through `service.prepare`, for
  it may take its time;
- `service.answers(...)` gives an `Answering` for each choice: an async iterator of `abcli.chat.answer.Piece`, the last
  of which has the `answer`. `chat.ask_chat(service, body)` does both;
- errors are raised: `problems.problem_of` says what each is in HTTP, and the route's `shape` how it is written;
- `gathering.respond` answers with all of them, as a whole or as they come;
- `events.EventStream` sends what an async iterator of lines gives, with keep-alives and errors.
"""
