-- One row per customer who has bought.
SELECT
    regexp_extract(value, '([0-9]+) +([0-9]{8})', 1) AS customer_id,
    'Customer' AS first_name,
    regexp_extract(value, '([0-9]+) +([0-9]{8})', 1) AS last_name,
    regexp_replace(min(regexp_extract(value, ' ([0-9]{8}) ', 1)), '(....)(..)(..)', '$1-$2-$3') AS signup_date
FROM transactions
WHERE value RLIKE ' [0-9]{8} '
GROUP BY regexp_extract(value, '([0-9]+) +([0-9]{8})', 1)
