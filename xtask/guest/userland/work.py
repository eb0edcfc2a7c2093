import hashlib, json, re

numbers = [(i * 2654435761) % 1000003 for i in range(300000)]
words = {}
for number in numbers:
    words[number % 5003] = words.get(number % 5003, 0) + number
text = json.dumps(sorted(words.items()))
print(len(re.findall(r"(\d)\1", text)), hashlib.sha256(text.encode()).hexdigest())
print(sum(a * b for a, b in zip(numbers, reversed(sorted(numbers)))), sum(i ** 0.5 for i in range(500000)))
