"""Asks a running server (examples/serve.sh) and prints its answer while it arrives.

python examples/client.py [--url http://127.0.0.1:8000/v1] [QUESTION]
"""

import argparse

from openai import OpenAI

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("question", nargs="?", default="Name three French cheeses.")
    args = parser.parse_args()
    stream = OpenAI(base_url=args.url, api_key="none").chat.completions.create(
        model="target",
        messages=[{"role": "user", "content": args.question}],
        temperature=0,
        max_tokens=128,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
