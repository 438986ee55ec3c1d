-- Stripe: one row per customer of the payments, with the name and city of the last card; see transactions.sql.
--
-- source payments: unified_payments*, payments*, stripe*
-- columns payments: id, Created date (UTC), Created (UTC), Customer ID, Customer Email, Card Name, Card Address City

WITH records AS (
    SELECT *,
        MAX(CASE WHEN trim(`Customer ID`) <> '' THEN nullif(lower(trim(`Customer Email`)), '') END)
            OVER (PARTITION BY trim(`Customer ID`)) AS email_of_id,
        nullif(lower(trim(`Customer Email`)), '') AS own_email
    FROM payments
),
ranked AS (
    SELECT *,
        ROW_NUMBER() OVER (
            PARTITION BY customer
            ORDER BY coalesce(trim(`Card Name`), '') = '', coalesce(`Created date (UTC)`, `Created (UTC)`) DESC,
                _delivery DESC, _source_row DESC
        ) AS recency
    FROM (
        SELECT *,
            coalesce(email_of_id, own_email) AS email,
            coalesce(email_of_id, own_email, nullif(lower(trim(`Customer ID`)), '')) AS customer
        FROM records
    )
    WHERE customer IS NOT NULL
)
SELECT DISTINCT
    xxhash64(customer) AS customer_id,
    nullif(regexp_extract(trim(`Card Name`), '^([\\s\\S]*?)\\s*(\\S+)$', 1), '') AS first_name,
    nullif(regexp_extract(trim(`Card Name`), '^([\\s\\S]*?)\\s*(\\S+)$', 2), '') AS last_name,
    email,
    nullif(trim(`Card Address City`), '') AS city,
    _delivery, _source_file, _source_row
FROM ranked
WHERE recency = 1
