"""`raymem explore`: the explorer in a browser, or its plot as a figure."""

from __future__ import annotations

import click

from raymem.cli.base import command_errors, debug_option, main


@main.command("explore")
@click.argument("store")
@click.option("--data", help="Where the images are, if not where the study had them.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port to serve on; 0: any free port."
)
@click.option("--figure", help="Write the plot to this .png, .svg or .pdf file, and end.")
@click.option("--across", default="memorization", help="Column on the horizontal axis of --figure.")
@click.option("--up", default="curvature_out", help="Column on the vertical axis of --figure.")
@click.option(
    "--epsilon", type=float, help="Privacy budget shown by --figure; by default the largest."
)
@debug_option
def explore_command(
    store: str,
    data: str | None,
    port: int,
    figure: str | None,
    across: str,
    up: str,
    epsilon: float | None,
    debug: bool,
) -> None:
    """Explore a store in a browser: hover, open, select and copy examples.

    Serves the report's explorer at 127.0.0.1 until Ctrl-C, for stores of any size: tables, images
    and outcomes of models are read on demand. The printed address contains a random token, without
    which nobody can read the page; nothing is written.

    Example: raymem explore runs/feldman_digits
    """
    from raymem.show.explorer_spec import draw_figure
    from raymem.show.notebook import StudyResults

    with command_errors(debug):
        opened = StudyResults(store, data)
        if figure:
            draw_figure(opened.store, figure, across=across, up=up, epsilon=epsilon)
            click.echo(f"figure: {figure}")
            return
        from raymem.show.explorer_server import serve_explorer

        serve_explorer(
            opened,
            port=port,
            told=lambda url: click.echo(f"explorer: {url}\nCtrl-C ends it", color=False),
        )
        click.echo("ended")
